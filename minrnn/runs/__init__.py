"""Trainings as folders: started, and taken up again from wherever they stand.

text        language models on a text
decisions   decision models on trajectories
"""
