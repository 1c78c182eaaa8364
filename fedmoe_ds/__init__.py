"""fedmoe-ds: federated fine-tuning of sparse mixture-of-experts models at cluster scale, on DeepSpeed expert parallelism."""

__version__ = "0.1.0"
