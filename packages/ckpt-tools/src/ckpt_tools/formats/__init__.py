"""Layouts of a model in a folder: what each tensor is called there, and which part of the model it holds."""
