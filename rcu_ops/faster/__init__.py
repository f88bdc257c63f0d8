"""Two-stage training of FASTER, the command ``rcu-ops faster``.

=================  ===================================================================================
:mod:`.cache`      what the two frozen networks say of every clip, on disk
:mod:`.training`   an aggregator trained from a cache, and what it says after every clip
:mod:`.curve`      accuracy against cost for all patterns and numbers of clips
=================  ===================================================================================
"""
