"""What serves the book and not the model: pictures, records of runs, models whose log p(x) is known, the recipe of a paper's table.

A chapter imports a module of it by name: ``from vaelib.book.plotting import show_images``; from `vaelib` each is there as well.
"""
