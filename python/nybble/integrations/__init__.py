"""Other packages' extension points, each in a file of its own that nothing else imports."""
