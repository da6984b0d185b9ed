"""`python -m mqtt_bridge` is `mqtt-bridge`."""

from mqtt_bridge.cli import main

if __name__ == "__main__":
    main()
