"""Whole numbers in English words, as prompts spell them: "twenty-one", "one hundred and five"."""

from mmjax.core.errors import InputError

SMALL = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
SMALL += ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
LARGEST = 999_999


def in_words(number: int) -> str:
    """A number from 0 to LARGEST, as the package num2words spells it; InputError for another."""
    if not 0 <= number <= LARGEST:
        raise InputError(f"{number:,} is not spelled in words; numbers from 0 to {LARGEST:,} are.")
    if number < 20:
        return SMALL[number]
    if number < 100:
        tens, ones = TENS[number // 10 - 2], number % 10
        return f"{tens}-{SMALL[ones]}" if ones else tens
    if number < 1000:
        hundreds, rest = f"{SMALL[number // 100]} hundred", number % 100
        return f"{hundreds} and {in_words(rest)}" if rest else hundreds
    thousands, rest = f"{in_words(number // 1000)} thousand", number % 1000
    if not rest:
        return thousands
    return f"{thousands}{' and' if rest < 100 else ','} {in_words(rest)}"
