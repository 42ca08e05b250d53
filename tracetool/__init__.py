"""The command line, the dataset store and the reports."""
