// Sets the chosen theme before anything is drawn; the default is the system's theme.
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "auto";
