"""What runs on a device: decode, train, measure, encode. It never knows which strategy it serves."""
