"""MindRecord files, read and written without mindspore."""

from msft.data.mindrecord.dataset import MindRecord, open_mindrecord
from msft.data.mindrecord.writer import MindRecordWriter

__all__ = ["MindRecord", "MindRecordWriter", "open_mindrecord"]
