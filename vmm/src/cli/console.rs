//! The user's terminal as the guest's console.
