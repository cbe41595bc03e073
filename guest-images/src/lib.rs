//! ferry-guest-images
