"""The operations worth a kernel: each has an XLA definition, some a kernel for GPUs beside it."""
