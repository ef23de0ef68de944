"""Images, models, samples and labels, and the files of maps."""
