"""The operations worth a kernel; each module holds the XLA definition."""
