# SPDX-License-Identifier: MIT OR Apache-2.0
"""RSA moduli that others can factor, as far as it is cheap to see. Two moduli that share a factor are not looked for:
with 90 000 keys that takes seconds for each.
"""

from __future__ import annotations

import math
from functools import lru_cache

from cryptography.hazmat.primitives.asymmetric import rsa


def _primes(below: int) -> list[int]:
    return [one for one in range(3, below, 2) if all(one % two for two in range(3, math.isqrt(one) + 1, 2))]


_SMALL = math.prod(_primes(4096))


def _powers_of_65537(prime: int) -> frozenset[int]:
    """What the powers of 65537 leave when they are divided by the prime."""
    left, found = 1, set()
    while left not in found:
        found.add(left)
        left = left * 65537 % prime
    return frozenset(found)


#: Primes made by Infineon's library are k * M + (65537 ** a mod M), M being the product of the first primes: so is
#: their product, seen modulo each of these (Nemec et al., "The Return of Coppersmith's Attack", 2017).
_ROCA = [(prime, _powers_of_65537(prime)) for prime in _primes(168)]
#: Steps of Fermat's method: primes that close were never two random ones (CVE-2022-26320).
_STEPS = 100


def weakness(modulus: int) -> str | None:
    """Why nobody should trust this modulus, None where nothing is seen."""
    if modulus % 2 == 0 or math.gcd(modulus, _SMALL) != 1:
        return "its modulus has a small factor"
    if all(modulus % prime in powers for prime, powers in _ROCA):
        return "made by a library whose keys can be factored (ROCA, CVE-2017-15361)"
    if _factors_are_close(modulus):
        return "the factors of its modulus are close to each other"
    if _is_prime(modulus):
        return "its modulus is a prime"
    return None


def _factors_are_close(modulus: int) -> bool:
    root = math.isqrt(modulus)
    for middle in range(root, root + _STEPS):
        square = middle * middle - modulus
        if square >= 0 and math.isqrt(square) ** 2 == square:
            return True
    return False


@lru_cache(maxsize=4096)
def _is_prime(odd: int) -> bool:
    """OpenSSL's own test, which it makes where a private key is loaded: with the number as one of its two primes.

    Python's `pow` takes eight times as long. For a prime it takes long, so that the same one isn't looked at twice.
    """
    other, exponent = 11, 65537
    order = math.lcm(odd - 1, other - 1)
    while math.gcd(exponent, order) != 1:
        exponent += 2
    secret = pow(exponent, -1, order)
    key = rsa.RSAPrivateNumbers(
        p=odd,
        q=other,
        d=secret,
        dmp1=secret % (odd - 1),
        dmq1=secret % (other - 1),
        iqmp=pow(other, -1, odd),
        public_numbers=rsa.RSAPublicNumbers(exponent, odd * other),
    )
    try:
        key.private_key()
    except ValueError:
        return False
    return True
