"""What a run leaves behind for people and programs: metrics, progress and the report page."""

from fedmoe_ds.report.html import write_report
from fedmoe_ds.report.metrics import MetricsLog
from fedmoe_ds.report.progress import Progress, final_table
from fedmoe_ds.report.record import Record, read_metrics

__all__ = ["MetricsLog", "Progress", "Record", "final_table", "read_metrics", "write_report"]
