"""What lies on a disk: checkpoints and other input read with limits, output whole or absent."""
