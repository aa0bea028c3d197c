"""Models: the shared base and one file per modality."""
