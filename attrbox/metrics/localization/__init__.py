"""Does a map mark the object?"""
