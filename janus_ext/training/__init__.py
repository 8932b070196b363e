"""The one training loop, the protocol of a benchmark around it, and what both show of themselves."""
