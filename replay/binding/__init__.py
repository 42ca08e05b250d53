"""Bindings: record tables of one source in, canonical events out (spec section M).

A binding is vectorised and works on slices of bounded size; it says with which confidence it shows each kind of event.
"""
