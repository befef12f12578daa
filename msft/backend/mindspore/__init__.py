"""The MindSpore engine: msft's own decoder, one compiled block at a time."""

import os

# MindSpore's log tells of every compilation; errors are enough unless the user has asked for more.
os.environ.setdefault("GLOG_v", "3")
