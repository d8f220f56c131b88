"""What the sub-commands of ``ritz`` do; :mod:`ritz.cli` holds the options. The one place in ritz that prints."""
