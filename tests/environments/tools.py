"""Tools as users write them."""


def calculate(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: for example 3 * (4 + 5)
    """
    return str(eval(expression, {}))


async def search(query: str, count: int = 2) -> list[str]:
    """Search for a text.

    Args:
        query: what to look for
        count: number of results
    """
    return [f"{query} {i}" for i in range(count)]


def undescribed(x: int) -> int:
    return x
