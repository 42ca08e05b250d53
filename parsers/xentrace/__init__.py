"""The binary stream that Xen's `xentrace` collector writes."""
