"""One file for each thing that a workflow may do, beside calling steps."""
