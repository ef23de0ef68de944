"""From a file of settings or the command line to files of maps and reports."""
