"""Changes of a call (see blocks.py) that make it wrong, for the tests of what is refused."""


def transposed(t):
    return t.t().contiguous().t()


def replaced(index, value):
    def change(block):
        block.parameters[index] = value(block.parameters[index]) if callable(value) else value

    return change


def with_constant(index, value):
    def change(block):
        block.constants = (*block.constants[:index], value, *block.constants[index + 1 :])

    return change


def with_x(value):
    def change(block):
        block.x = value(block.x)

    return change
