"""Training and evaluation of the papers' networks: ``rcu-ops train`` and ``rcu-ops evaluate``.

====================  ======================================================================================
:mod:`.config`        :class:`Recipe`: the papers' settings by name, and which of them the papers do not give
:mod:`.lists`         lists of labelled videos (CSV)
:mod:`.dataset`       training clips: every one a function of (seed, position), on any number of workers
:mod:`.train`         the loop: resumable after a kill, on one process or many
:mod:`.stored`        the loop of networks that read what others have put on the disk
:mod:`.scoring`       scores of one video: regular clips, sliding window, unrolled
:mod:`.evaluate`      scores and accuracy of a list of videos
====================  ======================================================================================
"""

from __future__ import annotations

from rcu_ops.recipes.config import RECIPES, Recipe, assumptions, get_recipe

__all__ = ["RECIPES", "Recipe", "assumptions", "get_recipe"]
