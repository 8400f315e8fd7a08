from outbox_relay.cli import main

if __name__ == "__main__":
    main()
