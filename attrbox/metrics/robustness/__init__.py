"""Do maps stay, or change, where they should?"""
