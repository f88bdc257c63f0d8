"""Video in and out: decoding, clip sampling, transforms, annotated video. Knows no kernels and no networks.

PyAV (``pip install 'rcu-ops[video]'``) is imported when a video is opened or written, never when this is imported.
"""

from rcu_ops.video.decode import BrokenVideoError, Frame, VideoError, VideoReader, open_video, read_frames

__all__ = ["BrokenVideoError", "Frame", "VideoError", "VideoReader", "open_video", "read_frames"]
