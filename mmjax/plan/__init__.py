"""What a run needs and how fast it can be on chips that are not here: the real compiler asked, nothing run."""
