//! Where NVIDIA's libraries are looked for.

use std::path::Path;

/// Where a library may be: as the loader finds it, then in the toolkit that the environment names.
pub(super) fn candidates(library: &str, newest: i32) -> Vec<String> {
    let majors = (12..=newest.max(12)).rev().map(|major| format!("lib{library}.so.{major}"));
    let names: Vec<String> = majors.chain([format!("lib{library}.so")]).collect();
    // An empty or relative folder would be one beside whoever runs the program.
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os);
    let homes = homes.filter(|home| Path::new(home).is_absolute());
    let folders = homes.flat_map(|home| ["lib64", "lib"].map(|folder| Path::new(&home).join(folder)));
    let in_folders: Vec<String> = folders
        .flat_map(|folder| names.iter().map(move |name| folder.join(name).display().to_string()))
        .collect();
    names.iter().cloned().chain(in_folders).collect()
}
