"""Secure sum: the server adds up what devices changed without seeing what any one of them changed.

The protocol is that of Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning",
Figure 4, without its fifth message), over a complete graph of devices. A round has four questions and answers:

======  ==========================================  ======================================================
phase   the server sends                            a device answers
======  ==========================================  ======================================================
keys    the number of the round                     two public keys, made for this round
shares  everybody's public keys                     for every other device, sealed: a share of its private
                                                    key and a share of the seed of its own mask
train   the model; the shares sealed for it         its change, quantised, plus its masks
reveal  who answered                                a share of the seed of each that did, of the private
                                                    key of each that did not; never both of one device
======  ==========================================  ======================================================

Each pair of devices agrees on a mask that one adds and the other subtracts: in the sum these cancel. Masks of a device
that went away in between are made again from its private key, put together from the shares of those that stayed. Each
device's own mask comes off by its seed, which is put together in the same way.

=============  ========================================================================
``shamir``     a secret in shares, and back
``ring``       numbers to integers modulo a power of two, and back; the error of it
``keys``       agreement, sealing, masks
``session``    what all devices of a round must agree on
``device``     a device's side, and what it keeps from one question to the next
``collector``  the server's side
``rounds``     the four questions over a Flower grid
=============  ========================================================================

docs/secure-sum.md says what this protects against, and what not.
"""
