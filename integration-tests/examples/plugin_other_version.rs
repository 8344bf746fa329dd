//! A library that calls itself a plugin of a revision that no host speaks. `plugin_load.rs` loads it.

const LINE: &[u8; 42] = b"megacontext-lora-abi 0.1.0 revision 999999";

/// The version line with its NUL.
#[unsafe(export_name = "megacontext_lora_abi_line")]
pub static ABI_LINE: [u8; LINE.len() + 1] = {
    let mut bytes = [0; LINE.len() + 1];
    let mut i = 0;
    while i < LINE.len() {
        bytes[i] = LINE[i];
        i += 1;
    }
    bytes
};
