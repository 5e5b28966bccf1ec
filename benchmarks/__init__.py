"""Scripts behind the figures of README and docs; README.md here says which command makes which table."""
