IMAGE_SIZE = 12
WORDS = tuple(
    "Change Remove Add Replace Move the color material count background position of to a at with "
    "circle square triangle diamond red green blue yellow magenta cyan white gray black solid hollow striped "
    "one two top bottom left right".split()
)
