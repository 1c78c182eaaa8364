"""Wave: the fused local step against PEFT, one client after the other, and against a floor of matrix products."""
