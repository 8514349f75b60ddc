"""The embedded world: small images, written in the official formats of the real data sets."""

from instructblip.scenes.official import SCENE_SETS, write_scenes

__all__ = ["SCENE_SETS", "write_scenes"]
