"""Training recipes: ``python -m recipes --list`` shows them, ``python -m recipes NAME --help`` their options.

A recipe is a module of this folder with the functions of :class:`recipes.recipe.Recipe`. It says what is trained; how (noise samples,
seeds, logs, checkpoints, tables) is the same for all of them.
"""
