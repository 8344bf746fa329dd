//! A device opened as programs open it, without a word of emulation in the process: the loader finds driver, compiler and products
//! under their names, and the compiler's results are kept. On the emulated libraries, which need a C++ compiler.

use std::fs;
use std::path::Path;
use std::process::Output;

use anyhow::{Context, Result, ensure};
use libloading::os::unix::Library;
use megacontext_kernels::cuda::linear::Products;
use megacontext_kernels::cuda::{Device, norm};

use crate::emulated::libraries::search_path;
use crate::support::child;

/// A child that finds the emulated libraries; none without a compiler.
fn alone(test: &str, environment: &[(&str, &str)]) -> Result<Option<Output>> {
    let Some(path) = search_path()? else { return Ok(None) };
    let path = path.to_str().context("a path in UTF-8")?;
    let output = child(test, &[&[("LD_LIBRARY_PATH", path)], environment].concat())?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{test}: {}\n{text}{errors}", output.status);
    Ok(Some(output))
}

/// What a child says on opening the device with this cache.
fn opened(cache: &Path, more: &[(&str, &str)]) -> Result<Option<String>> {
    let cache = ("MEGACONTEXT_CUDA_CACHE", cache.to_str().context("a path in UTF-8")?);
    let output = alone("opening::opens", &[&[cache], more].concat())?;
    Ok(output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()))
}

#[test]
#[ignore = "run by the others, in a process of its own"]
fn opens() -> Result<()> {
    // The device lets go of its compiler, and what that counted would go with it.
    // SAFETY: the library has no initialisers.
    let nvrtc = unsafe { Library::new("libnvrtc.so.12") }?;
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("open: {error}");
            return Ok(());
        }
    };
    println!("open: {} {}", device.name(), device.capability());
    // SAFETY: the library is `cu/emulate/nvrtc.cpp`, and this is the function's type.
    let compiled = unsafe { nvrtc.get::<extern "C" fn() -> usize>(b"emulated_nvrtc_compiled") }?;
    println!("compiled: {}", compiled());
    let (x, gain) = (device.upload(&[3f32, -4.0])?, device.upload(&[1f32, 2.0])?);
    let mut y = device.zeros::<f32>(2)?;
    norm::rms_forward(&device, &x, &gain, 0.0, &mut y)?;
    println!("norm: {:.4?}", device.download(&y)?);
    Products::open(&device)?;
    println!("products: open");
    Ok(())
}

#[test]
fn a_device_opens_by_what_the_loader_finds_and_the_second_time_from_the_cache() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cache = folder.path().join("of/code");
    let expected = |compiled: usize| {
        format!(
            "open: emulated device 0 8.0\ncompiled: {compiled}\nnorm: [0.8485, -2.2627]\nproducts: open\n"
        )
    };
    let Some(first) = opened(&cache, &[])? else { return Ok(()) };
    ensure!(first.contains(&expected(11)), "{first}");
    let files: Vec<_> = fs::read_dir(&cache)?.flatten().map(|entry| entry.path()).collect();
    ensure!(files.len() == 11, "a file for each of the sources, and nothing beside them: {files:?}");
    let second = opened(&cache, &[])?.context("a compiler, as before")?;
    ensure!(second.contains(&expected(0)), "{second}");
    fs::write(files.first().context("a file")?, "not what was kept")?;
    let third = opened(&cache, &[])?.context("a compiler, as before")?;
    ensure!(third.contains(&expected(1)), "{third}");
    Ok(())
}

#[test]
fn an_architecture_that_the_compiler_does_not_know_is_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(said) = opened(folder.path(), &[("EMULATED_CAPABILITY", "100")])? else { return Ok(()) };
    let expected = "open: CUDA: NVRTC 12.0: attention_bounds.cu for sm_100: NVRTC_ERROR_INVALID_OPTION\n\
                    nvrtc: error: invalid value for --gpu-architecture (-arch)\n";
    ensure!(said.contains(expected), "{said}");
    ensure!(fs::read_dir(folder.path())?.next().is_none(), "nothing is kept of what did not compile");
    Ok(())
}

#[test]
fn the_emulated_compiler_is_held_to_what_the_real_one_is() -> Result<()> {
    for test in ["images::caches", "images::refuses"] {
        let Some(output) = alone(test, &[])? else { return Ok(()) };
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(text.contains("1 passed") && !text.contains("skipped"), "{test}: {text}");
    }
    Ok(())
}
