"""LeRobot datasets, normalisation, chunk sampling, demonstrations."""
