"""Does removing what a map marks change the score?"""
