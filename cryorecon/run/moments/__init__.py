"""Jobs of engine moments: from a stack to a moments file, from that to a map."""
