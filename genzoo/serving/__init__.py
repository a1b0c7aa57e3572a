"""A local web page to sample from trained runs side by side, and to fill drawn masks."""
