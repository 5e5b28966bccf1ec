"""What tests of several folders use; pyproject.toml puts this folder on their path."""
