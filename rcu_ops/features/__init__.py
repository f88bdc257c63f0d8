"""Features of clips from any layer of any network, their reduction by PCA, and ``rcu-ops features``.

================  ============================================================================================
:mod:`.extract`   the clips of one video through a network, the output of one layer kept
:mod:`.files`     one file of features per video, grown clip by clip, and read back for a recurrent network
:mod:`.pca`       principal components fitted in batches
:mod:`.training`  the residual recurrent stack trained on stored features, ``rcu-ops features-train``
================  ============================================================================================
"""
