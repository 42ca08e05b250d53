"""Readers of ftrace text in all its layouts; columns that they share with the trace.dat reader."""
