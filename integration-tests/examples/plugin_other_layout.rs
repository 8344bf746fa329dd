//! A plugin with the right version line and another root module: what a build from changed sources would look like.
//! `plugin_load.rs` loads it.

use abi_stable::library::RootModule;
use abi_stable::prefix_type::PrefixTypeTrait;
use abi_stable::sabi_types::VersionStrings;
use abi_stable::{StableAbi, export_root_module, package_version_strings};

/// The version line.
#[unsafe(export_name = "megacontext_lora_abi_line")]
pub static ABI_LINE: [u8; megacontext_lora_abi::VERSION_BYTES.len()] = megacontext_lora_abi::VERSION_BYTES;

/// A root module whose first field has another type.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = PluginModuleRef, prefix_fields = PluginModulePrefix)))]
#[sabi(missing_field(panic))]
pub struct PluginModule {
    /// Not a u32.
    #[sabi(last_prefix_field)]
    pub abi_revision: u64,
}

impl RootModule for PluginModuleRef {
    abi_stable::declare_root_module_statics! {PluginModuleRef}
    const BASE_NAME: &'static str = "megacontext_lora";
    const NAME: &'static str = "megacontext-lora";
    const VERSION_STRINGS: VersionStrings = package_version_strings!();
}

#[export_root_module]
fn root_module() -> PluginModuleRef {
    PluginModule { abi_revision: 2 }.leak_into_prefix()
}
