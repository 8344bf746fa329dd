#![no_main]

use libfuzzer_sys::fuzz_target;
use megacontext_lora::untrusted;

fuzz_target!(|bytes: &[u8]| {
    let _ = untrusted::allocation(bytes);
});
