"""Files of maps: their schema, reading, writing, journals, and merging."""
