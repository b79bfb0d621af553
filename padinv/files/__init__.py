"""Files of networks: ours, and those of other projects."""
